"""peft methods behind one interface: an adapter turns a frozen backbone into named parameters with roles."""
