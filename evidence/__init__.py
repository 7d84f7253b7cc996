"""What robust tokens keep and naive tokens lose: measured on data, against peers, and on a moving robot."""
