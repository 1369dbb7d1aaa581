"""KFP pipelines, the compiler from a contract to a package, and the runners."""
