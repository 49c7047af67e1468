"""What real text does inside a model: the statistics that `neo-calibrate` wrote, read."""
