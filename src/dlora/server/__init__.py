"""The gRPC server around the cloud's model: who may call, how much, and fairness."""
