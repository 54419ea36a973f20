"""Channel pruning of detectors to a budget.

After "Creating Lightweight Object Detectors with Model Compression for Deployment on Edge Devices" (arXiv
1905.01787), of which we could read the abstract: the steps and scores are our design, and each file says so.
"""
