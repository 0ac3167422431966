"""The services of Caravan. They never import each other: they meet in protos/ only."""
