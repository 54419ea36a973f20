"""Vision: networks for images, their search, detection and stereo."""
