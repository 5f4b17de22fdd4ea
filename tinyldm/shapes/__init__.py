"""The toy world of the bundled model: its scenes, their drawing, its judge, and its recipe."""
