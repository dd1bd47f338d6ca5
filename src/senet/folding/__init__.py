"""``senet.fold``: gates whose excitations hardly depend on the image become constants in the weights."""
