"""Parts that several test-time methods share: gradient steps, teachers, scores, optimizers, views."""
