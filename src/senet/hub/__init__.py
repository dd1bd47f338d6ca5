"""Networks as files, folders and repositories for others, and in timm's registry."""
