"""What a bundle is: its files, what they promise, and the limits they are judged by."""
