"""What crosses a process: message types, their codec, framed sockets. No torch, no pickle."""
