"""Ways of unlearning, one file each, as the registry's table `unlearning` names them."""
