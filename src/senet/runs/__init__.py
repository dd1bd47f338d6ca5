"""What a run is: its settings, its recipe, its data, and the folder that keeps them."""
