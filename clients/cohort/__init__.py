"""The cohort engine: many clients' adapters are trained together on one base."""
