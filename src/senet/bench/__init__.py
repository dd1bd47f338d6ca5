"""What SE costs here in time, of everybody in turn, checked first."""
