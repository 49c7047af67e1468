"""Generation options: names, values, and what a bundle says of them."""
