"""Unlearning: a finished run's model without a client, a task or some records; and what is left of them in it."""
