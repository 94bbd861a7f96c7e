"""What runs on the workers.  loop.py is the training, read it top to bottom; launch.py is the door to Ray Train."""
