"""What a person sees.

screen.py    start here: the two consoles that everything is printed on; a user's text is text on them, never markup
"""
