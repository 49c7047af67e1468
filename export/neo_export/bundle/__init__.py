"""The bundle: its graphs and weights, its other files, their checks, and how it is put in place."""
