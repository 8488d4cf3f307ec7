"""The ladder: engines from the notebook's loop to the hardware limit."""
