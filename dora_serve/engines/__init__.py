"""The engines that serve what dora-export made."""
