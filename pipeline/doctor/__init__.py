"""`regionspot doctor`: is everything there that an extraction needs?"""
