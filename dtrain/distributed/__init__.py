"""The ranks as one world: rendezvous, handshake, collectives, consistency checks, agreed stops and seeds."""
