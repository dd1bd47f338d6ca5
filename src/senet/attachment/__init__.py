"""``senet.attach``: adds SE to any network, at sites found in its data flow."""
