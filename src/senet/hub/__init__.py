"""Sharing networks: as files, folders, and repositories on the Hugging Face Hub, and through timm's registry."""
