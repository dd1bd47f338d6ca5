"""Loading weights into networks: find the file, read it, recognize its layout, rename its keys, and fit them."""
