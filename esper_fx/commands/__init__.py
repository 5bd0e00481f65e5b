"""What the command line runs besides the demo."""
