"""What runs on the robot: numpy plus the one backend in use."""
