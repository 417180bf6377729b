"""The verbs of the command line that fill a module of their own, and the options they share."""
