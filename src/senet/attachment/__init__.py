"""``senet.attach``: SE in any network, at the sites that its data flow shows."""
