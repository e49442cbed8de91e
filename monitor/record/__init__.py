"""Recording: the only room that hooks torch. `attach` is the way in."""
