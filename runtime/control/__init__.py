"""The decoder inside an on-robot control loop."""
