"""What is measured before a stream begins: scatter, rehearsed shifts, places. A new rehearsal goes to `rehearsals`."""
