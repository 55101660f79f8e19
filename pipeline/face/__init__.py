"""What people take into their hands: a memory as a thing."""
