"""What proves a bundle, a decoder and a machine: self-test, faults, soak, replay, compatibility."""
