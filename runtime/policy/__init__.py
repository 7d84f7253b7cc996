"""What a policy needs: ids of a vocabulary, and the published torch model's calls."""
