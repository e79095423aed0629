"""What a client or another's file may make expensive, in a process that has bounds."""
