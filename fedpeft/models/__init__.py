"""The one view of a frozen base model, how it is loaded, and what is put over it."""
