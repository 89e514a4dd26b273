"""Files that a run writes, and who may write them."""
