"""What a cloud that records could recover: recording, attacks, audit."""
