"""What bit-meta does to a network's statistics, and what chosen bits follow (Fig. 1, 2, 6 to 9)."""
