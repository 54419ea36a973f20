"""Search: what to choose for each block of a network so that the whole fits a device or a memory.

After DONNA (Moons et al. 2020, arXiv 2012.08859), of which we could read the abstract: what it leaves open is
our reading, and each file says so. Import from the modules; `modicum.search.milp` needs scipy.
"""
