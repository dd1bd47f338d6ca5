"""What the machine and its file system give: timing, memory, folders, files, figures."""
