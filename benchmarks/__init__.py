"""How fast and how accurate: problems, contenders and what they are held against. ``pytest benchmarks`` runs them."""
