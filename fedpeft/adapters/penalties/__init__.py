"""Terms of the loss that keep an adapter near something: `adapter.penalty` names one."""
