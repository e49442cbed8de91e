"""Measurements beyond the ordinary step, for `monitor.attach`: one file each.

monitor.attach(model, curvature="auto")
monitor.attach(model, probes=[OddFraction(inputs)])
"""
