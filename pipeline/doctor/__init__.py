"""`regionspot doctor`: checks of what an extraction needs."""
