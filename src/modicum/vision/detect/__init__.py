"""Small object detectors: trained, pruned to a budget, evaluated and used. Import from the modules."""
