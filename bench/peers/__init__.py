"""What zps is measured against, and zps itself, each behind `bench.peers.base.Peer`."""
