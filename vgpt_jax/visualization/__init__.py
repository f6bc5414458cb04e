"""Arrays in, pictures out: grids, the decoding GIF, plots."""
