"""Vision: networks for images, found by architecture search. Import from the modules."""
